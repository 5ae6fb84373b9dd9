"""The registry of adapters: admission, weights, samples, embeddings."""
