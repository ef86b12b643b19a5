"""The paper's figures, from checkpoints."""
