"""`llava-compodistill reproduce`: the paper's tables and figures as data, trained and reported by one command."""
