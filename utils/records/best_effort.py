"""Records are not the run: what can't be written is reported, and the training continues."""

from utils.terminal import say


class BestEffort:
    """A record that may fail without ending the training.

    One line reports its first failure, and one that it works again. Only `errors` count as its failures: any other type
    is an error of the program and is raised.
    """

    def __init__(self, name, errors=OSError, outcome="the training continues"):
        """`name` begins the sentence "`name` has failed", and `outcome` says what follows from it."""
        self.name, self.errors, self.outcome = name, errors, outcome
        self.failed = False

    def attempt(self, action):
        """Call `action()`, also after a failure."""
        try:
            action()
        except self.errors as error:
            if not self.failed:
                say(f"warning: {self.name} has failed ({reason(error)}); {self.outcome}")
            self.failed = True
        else:
            if self.failed:
                say(f"{self.name} works again")
            self.failed = False


def reason(error):
    """An exception in one line."""
    text = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
    return text or type(error).__name__
