"""Generated word problems of two steps, for language models that are small and yet speak."""
