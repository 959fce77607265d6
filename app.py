"""The web page, as `diffattn app` opens it."""

from diffattn.app.jobs import Worker
from diffattn.app.page import launch

if __name__ == "__main__":
    launch(Worker())
