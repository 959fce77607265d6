"""The programs behind `diffattn bench`: what is compared, in turns, and the reports."""
