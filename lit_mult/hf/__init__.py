"""Hugging Face's Llama and Qwen3: our models written as one, and runs that start from one."""
