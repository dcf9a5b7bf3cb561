"""Training on the highest-entropy tokens inside other trainers: verl and TRL."""

# The minor versions whose private functions the integrations replace. tests/integrations/*/requirements.txt pins the
# versions that the tests run.
SUPPORTED = {"verl": "0.9", "trl": "1.16"}


def is_supported(package: str, installed: str) -> bool:
    """Whether `installed`, a version such as "0.9.1", is a supported version of `package`, "verl" or "trl"."""
    return installed.split(".")[:2] == SUPPORTED[package].split(".")
