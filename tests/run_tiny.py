"""Train as the JSON in the first argument says; without one, in a forked child for each line of JSON on stdin.

A child needs no imports of its own, so that it is trained and killed in a second. Its number is printed when it is
there, and its wait status when it has ended.
"""

import json
import os
import sys
import traceback


def run(text: str) -> None:
    """Train."""
    from diffusion.training.run import train

    train(json.loads(text))


def forked(text: str) -> int:
    """Train in a child whose messages go to the file that the first word of the line names, and return its number."""
    path, _, config = text.partition(" ")
    child = os.fork()
    if child:
        return child
    messages = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(messages, 1)
    os.dup2(messages, 2)
    if json.loads(config)["trainer"].get("strategy") == "ddp":
        become_two_ranks()
    status = 1
    try:
        run(config)
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def become_two_ranks() -> None:
    """Start the second rank as Lightning does, as a child of the first with the same variables, but without imports."""
    from lightning.fabric.plugins.environments.lightning import find_free_network_port
    from lightning.pytorch.utilities import rank_zero_only

    from diffusion.ranks import FIRST

    os.environ[FIRST] = str(os.getpid())
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_network_port())}
    os.environ |= {"NODE_RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    if os.fork() == 0:
        os.environ["LOCAL_RANK"] = "1"
        rank_zero_only.rank = 1


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run(sys.argv[1])
        raise SystemExit
    import diffusion.training.denoiser
    import diffusion.training.run
    import diffusion.training.samples  # noqa: F401

    for line in sys.stdin:
        number = forked(line)
        print(number, flush=True)
        print(os.waitpid(number, 0)[1], flush=True)
