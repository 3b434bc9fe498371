"""What every training of an adapter must hold to, whatever its base."""

import torch

from studio.adapter import load_adapter


def run_and_find_the_base_unchanged(training):
    """Runs it to its end: every patch has learned, and every value of the base is what it was, to the bit."""
    whole = torch.nn.ModuleDict(training.base.modules)
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    list(training.events(lambda: False))
    learned = load_adapter(training.run.adapter_path)
    assert all(terms["main"].up.any() for terms in learned.patches.values())
    after = whole.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], value) for name, value in after.items())
