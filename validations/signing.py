"""Whether a model carries a valid signature of a given key: `model-signing` (sigstore), with a key, offline.

The library is an extra (`signing`) and imported only where a policy asks for it: it brings 15 other packages.
"""

from pathlib import Path

SIGNATURE = "model.sig"
"""Where the signature lies in the model's directory. It covers every other file there but git's own.
"""
_NOT_SIGNED = "registered_model_meta"
"""MLflow adds it to what it downloads."""


class UnusableKey(ValueError):
    """The file is no public key that signatures can be checked with; the message is one line."""


def error(model: Path, key: Path) -> str:
    """Why the signature of `model` is not that of `key` (PEM, elliptic curve); empty where it is valid.

    No network is used. Raises `UnusableKey`; ModuleNotFoundError where the extra `signing` is not installed.
    """
    from model_signing import hashing, verifying

    try:
        verifier = verifying.Config().use_elliptic_key_verifier(public_key=key)
    except (ValueError, TypeError, AttributeError) as bad:
        raise UnusableKey(
            f"{key.name} is no public key in PEM of the curves P-256, P-384 or P-521: "
            "make one with `openssl ec -in private.pem -pubout`"
        ) from bad
    signature = model / SIGNATURE
    if not signature.is_file():
        return (
            f"there is no {SIGNATURE} among its files: sign the model before it is registered, with "
            f"`model_signing sign key --private-key KEY --signature MODEL/{SIGNATURE} MODEL`"
        )
    ignored = hashing.Config().set_ignored_paths(paths=[SIGNATURE, _NOT_SIGNED], ignore_git_paths=False)
    verifier.set_hashing_config(ignored)
    try:
        verifier.verify(model, signature)
    except Exception as bad:  # noqa: BLE001 - whatever the library stumbles over, the signature is not valid
        said = " ".join(str(bad).split())[:300]
        return f"{type(bad).__name__}: {said}" if said else "it is not the signature of this key"
    return ""
