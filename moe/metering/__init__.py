"""What a run costs and how well it goes: energy, speed, FLOPs, router balance, and where they are shown.

Nothing is imported here, so `import moe.metering` is free; take names from the modules.
"""
