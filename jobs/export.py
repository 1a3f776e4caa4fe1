"""Write a saved probe in a form that other programs read.

python jobs/export.py --probe runs/selftrain/probe --out model.onnx
"""

from lpclip.jobs.cli import run_command

if __name__ == "__main__":
    run_command("export")
