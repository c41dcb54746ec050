"""Hugging Face's Llama: our models written as one, and runs that start from one."""
