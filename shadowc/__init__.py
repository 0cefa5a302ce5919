"""shadowc: compile OPT and Llama checkpoints to run with contextual sparsity."""
