"""The run: inputs, loop, report."""
