"""What a user asks about a model, a recipe or a run."""
