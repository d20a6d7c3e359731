"""From raw records to an adapter that the build takes: data, fine-tuning, evaluation, pruning, one pipeline."""
