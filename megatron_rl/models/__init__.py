"""What a model is: facts of its config.json, its architecture, the names of its weights, its hardware."""
