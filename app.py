"""The web page, as `diffattn app` opens it."""

from diffattn.jobs import Worker
from diffattn.webui import launch

if __name__ == "__main__":
    launch(Worker())
