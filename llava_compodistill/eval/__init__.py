"""Scoring LLaVA checkpoints."""
