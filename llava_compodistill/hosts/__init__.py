"""The code bases that a model can come from. Today: LLaVA."""
