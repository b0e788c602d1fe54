"""What leaves a run for others to load: dense models, stock mixtures of experts, GGUF files, checked and described."""
