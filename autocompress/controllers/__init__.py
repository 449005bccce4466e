"""Who proposes: ask for a policy, tell what became of it."""
