"""Text in figures of matplotlib."""


def literal(text: str) -> str:
    """Return a text so that matplotlib draws it as it is: between two dollars is a formula, perhaps a wrong one."""
    return text.replace("$", r"\$")
