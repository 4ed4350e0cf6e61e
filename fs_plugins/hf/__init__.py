"""All that knows transformers: loading, chat and zero-shot models, other encoders into them, lmms-eval."""
