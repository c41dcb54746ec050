"""The model: roles of matrices, their multipliers, and the Llama-style decoder built from them."""
