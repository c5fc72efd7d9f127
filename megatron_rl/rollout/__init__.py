"""Generation: the engine protocol, the engines and the collection of a step's rollouts."""
