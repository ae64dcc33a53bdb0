"""LlavaOnevision folders of transformers, read and written."""
