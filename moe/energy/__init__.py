"""What is done with measured joules: the ledger of a site, and the levers that lower them.

ledger (of run folders) and carbon (of hours) make the report of `moe energy report`, ledger_page writes it.
power_control changes a GPU's limits and puts them back, sweep looks for the best of them, clock_plan slows
pipeline stages that would wait.
"""
