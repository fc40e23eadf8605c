"""Online features: compiled plans, stores that read them, the join to model inputs."""
