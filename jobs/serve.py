"""Answer requests over HTTP with a saved probe.

python jobs/serve.py --probe runs/selftrain/probe --port 8000
"""

from lpclip.jobs.cli import run_command

if __name__ == "__main__":
    run_command("serve")
