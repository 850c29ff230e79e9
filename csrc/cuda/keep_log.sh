# Runs a compiler: what it writes to stderr goes to <object>.log, and warnings and errors are shown.
for last in "$@"; do
  [ "$previous" = -o ] && object=$last
  previous=$last
done
"$@" 2>"$object.log"
status=$?
grep -v '^ptxas info\|^    [0-9]* bytes stack frame' "$object.log" >&2
exit $status
