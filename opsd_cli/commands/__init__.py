"""argv -> library call -> exit code. The only layer that prints or exits."""

COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("opsd_cli.commands.train", "train a model, resume a run, run a sweep"),
    "eval": ("opsd_cli.commands.evaluate", "measure a model or a run on held-out problems"),
    "generate": ("opsd_cli.commands.generate", "a model answers a prompt, a file of prompts, or you in a chat"),
    "export": ("opsd_cli.commands.export", "a checkpoint of a run as a Hugging Face folder, merged or not"),
    "watch": ("opsd_cli.commands.watch", "the screen of a run, from another terminal or after its end"),
    "doctor": ("opsd_cli.commands.doctor", "the machine, and a recipe on its real model and data, before a run"),
    "probe": ("opsd_cli.commands.probe", "whether training is likely to help, measured before any of it"),
    "compare": ("opsd_cli.commands.compare", "arms over seeds, paired, and what may be claimed"),
    "plan": ("opsd_cli.commands.plan", "memory and time of a recipe before anything is loaded; whether it fits"),
    "inspect": ("opsd_cli.commands.inspect", "both prompts, and a completion token by token"),
    "runs": ("opsd_cli.commands.runs", "list the runs, show what differs between two"),
    "report": ("opsd_cli.commands.report", "what came of a run, of several, of a sweep; as text or as a page"),
    "recipes": ("opsd_cli.commands.recipes", "list the recipes, print one composed, copy one to edit"),
    "completion": ("opsd_cli.commands.completion", "Tab in bash, zsh and fish"),
    "new": ("opsd_cli.commands.new", "write a part of your own to change: a divergence, a context, ..."),
}
"""name -> (module with HELP and main, one line of help)."""
