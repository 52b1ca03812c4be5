"""How long the contenders of a study take for a training step and a forward pass, interleaved in one process."""

import json

import torch

from benchmarks.steps import TimedStep, machine, random_batch
from command_line import model_maker
from utils.data.datasets import DataOptions, count_classes
from utils.parallel.processes import choose_device
from utils.profiling import time_interleaved
from utils.records.files import replace_file
from utils.records.run_folder import commit_of_code
from utils.study_records import SEEDS
from utils.study_tables import STEP, speed_file

FORWARD = "forward pass"
ROUNDS = 5
NOT_OF_STEP = {*SEEDS, "learning_rate", "num_steps", "epochs", "warmup_steps", "eval_every", "save_every"}
NOT_OF_STEP |= {"pretrained_dir"}


def measured_times(planned, jobs=1, further=None):
    """The content of the file of times: {"machine", "seconds": {contender: {what: [seconds per round]}}, ...}.

    `planned` are the Planned final runs of one group, one of each contender. All contenders are timed unless the file
    has them with these flags: only times of one process can be compared. On a CPU a step has the threads of a run among
    `jobs`. `further(model, batch size)` gives more to be timed, {what: function}.
    """
    file = speed_file(planned[0].path.parent, planned[0].entry)
    wanted = {each.entry["contender"]: flags_of_step(each.entry) for each in planned}
    content = read_json(file)
    if known_of(content, "seconds", wanted).keys() == wanted.keys():
        return content
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // jobs))
    try:
        origin = {"machine": machine(), "commit": commit_of_code(), "rounds": ROUNDS}
        seconds = time_passes({each.entry["contender"]: each.run.flags for each in planned}, further)
    finally:
        torch.set_num_threads(threads)
    content = {**origin, **completed({}, "seconds", seconds, wanted)}
    write_json(file, content)
    return content


def flags_of_step(entry):
    """The flags of a record or entry that a step may depend on."""
    return {name: value for name, value in entry["flags"].items() if name not in NOT_OF_STEP}


def were_timed(content, record, contenders):
    """Whether the content has times of all contenders, {name: their own flags}, as in the runs of a record's group."""
    varied = set().union(*contenders.values())
    shared = {flag: value for flag, value in flags_of_step(record).items() if flag not in varied}
    timed = content.get("flags", {})
    return all(name in timed and {**shared, **own}.items() <= timed[name].items() for name, own in contenders.items())


def time_passes(flags_of, further=None):
    """{contender: {what: [seconds per round]}} for {contender: flags of its runs}."""
    device, functions = choose_device(), {}
    for name, flags in flags_of.items():
        classes = count_classes(flags.dataset, DataOptions.from_flags(flags))
        torch.manual_seed(0)
        model = model_maker(flags)(classes)
        step = TimedStep(model, flags, classes, device)
        images, labels = random_batch(flags.train_batch_size, flags.img_size, device)
        labels %= classes
        functions[name, STEP] = lambda step=step, images=images, labels=labels: step.train(images, labels)
        functions[name, FORWARD] = lambda step=step, images=images: step.forward(images)
        for what, function in (further(model, flags.train_batch_size) if further else {}).items():
            functions[name, what] = function
    print(f"timing {len(flags_of)} contenders in {ROUNDS} rounds", flush=True)
    seconds = {}
    for (name, what), rounds in time_interleaved(functions, ROUNDS, device).items():
        seconds.setdefault(name, {})[what] = rounds
    return seconds


def read_json(file):
    return json.loads(file.read_text()) if file.exists() else {}


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda temporary: temporary.write_text(json.dumps(content, indent=1) + "\n"))


def known_of(content, key, wanted):
    """{contender: value} under `key` of a file's content for the contenders in `wanted`, {contender: its flags}.

    Without those that were measured with other flags, such as another layer.
    """
    flags, values = content.get("flags", {}), content.get(key, {})
    return {name: values[name] for name in wanted if name in values and flags.get(name) == wanted[name]}


def completed(content, key, known, wanted):
    """The file's content under `key` and its flags, with what is known of the contenders in `wanted`."""
    return {"flags": {**content.get("flags", {}), **wanted}, key: {**content.get(key, {}), **known}}
