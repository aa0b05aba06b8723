"""Model definitions: an architecture record, a shared decoder, one file per Hugging Face architecture."""
