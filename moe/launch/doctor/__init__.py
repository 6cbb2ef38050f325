"""`moe doctor`: what is wrong with a machine or a job's nodes, before a run finds out."""
