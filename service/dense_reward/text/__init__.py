"""From text to token ids and back: rendering, special tokens, offsets."""
