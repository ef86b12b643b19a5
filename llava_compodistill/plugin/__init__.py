"""The address that patched LLaVA checkouts import, whatever moves in here (patches/*-plugin-hook.patch)."""
