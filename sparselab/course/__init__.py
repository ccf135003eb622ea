"""Checks of the course's exercises, which say what is wrong with an answer; one module for each problem set."""

from sparselab.course.answers import Answer, CheckError

__all__ = ["Answer", "CheckError"]
