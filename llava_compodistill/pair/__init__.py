"""The student, its teacher, and what goes between them: adapter, encoder, layers."""
