"""Fine-tuning: what trains (`select`), small edits of the parameters (`deltas`), a frozen base in
fewer bytes (`shrink`), features computed once (`features`)."""
