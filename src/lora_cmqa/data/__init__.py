"""rows -> examples -> tokens -> packed batches. No model, no GPU, no torch."""
