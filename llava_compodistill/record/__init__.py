"""The only room that patches a forward: what a pass of a model leaves behind."""
