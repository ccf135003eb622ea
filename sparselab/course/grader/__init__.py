"""The teacher's side of the course: what is handed out, what comes back, and how it is graded with nbgrader."""
