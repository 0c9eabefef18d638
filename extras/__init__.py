"""What the three tasks can do without. Each file holds one idea, and an option or a script of the root uses it."""
