"""A name -> (model, tokenizer)."""
