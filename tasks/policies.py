"""Policy files: read, and refused in one line."""

from pathlib import Path

from tasks.settings import Mistake
from validations.policy import Policy, PolicyError, read


def read_policy(path: Path, model: str | None = None) -> tuple[str, Policy]:
    """The text of a policy file, and the policy. Raises `Mistake` where it cannot be read or is not `model`'s."""
    try:
        text = path.read_text()
    except OSError as error:
        raise Mistake(f"the policy {path} cannot be read: {error.strerror}", code=2) from error
    except UnicodeDecodeError as error:
        raise Mistake(f"the policy {path} is not text in UTF-8", code=2) from error
    try:
        policy = read(text, path.name)
    except PolicyError as error:
        raise Mistake(str(error), code=2) from error
    if model is not None and policy.model != model:
        raise Mistake(f"{path.name} is the policy of {policy.model}, not of {model}: name the right one", code=2)
    return text, policy
