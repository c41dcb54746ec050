"""What export and import need beyond the core, imported when it is needed."""

from __future__ import annotations

from lit_mult.errors import UserError


def require_export_extra() -> None:
    """Raises: UserError when transformers or safetensors is not installed."""
    try:
        import safetensors  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        said = f"Hugging Face folders need {error.name or 'transformers'}: pip install 'lit-mult[export]'"
        raise UserError(said) from None
