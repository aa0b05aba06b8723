"""min-p, top-k and top-p truncation of logits without a sort."""
