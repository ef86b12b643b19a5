"""`llava-compodistill plan`: what a stage needs, from config files alone. Nothing here imports PyTorch.

configs (sizes of models), setup (how a stage runs) -> memory, flops (the formulas) -> planner (what fits, how long) ->
launch, report, cli.
"""
