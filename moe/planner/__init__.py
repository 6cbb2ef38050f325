"""Memory, time, energy and cost of a training run in closed form, before a GPU starts.

Reads in this order: shape (sizes) -> weights (every tensor) -> counts (parameters, FLOPs); settings (what
is assumed), layout -> stages; hardware; activations -> memory; ops -> roofline and collectives -> step;
energy -> site, campaign. plan joins them, evidence says how far to trust them, search tries layouts,
schedule plays the pipeline out, validate compares with published runs, report and plots show. Nothing here
imports torch. Take names from the modules.
"""
