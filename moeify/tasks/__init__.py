"""What the loop learns: a recipe's data section made into batches, a network and a loss."""
