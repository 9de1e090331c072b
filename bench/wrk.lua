-- Sends the requests of a file in turn, one at a time on each connection, and prints what came of it as JSON.
-- The file, named after `--`: the length of each request on a line of its own, then the request.
-- An idempotency key must be new in each request, or the message counts as a duplicate: a placeholder of wires.py
-- becomes another key each time, of the same length, so that the Content-Length stays right.
local requests, turn = {}, 0
local clock = os.time() * 1e6 -- us; each key takes the next one, and a request takes longer than that

local function hex(digits)
    return string.format("%0" .. digits .. "x", math.random(0, 16 ^ digits - 1))
end

local keys = {
    ["a-key-that-begins-with-the-time."] = function()
        clock = clock + 1
        return string.format("%014x", clock) .. hex(9) .. hex(9)
    end,
    ["a-random-key...................."] = function() return hex(8) .. hex(8) .. hex(8) .. hex(8) end,
}

-- A request as it is sent: its text, or what stands before and after its key, and what makes the key.
local function prepared(text)
    for placeholder, key in pairs(keys) do
        local first, last = text:find(placeholder, 1, true)
        if first then
            return {before = text:sub(1, first - 1), key = key, after = text:sub(last + 1)}
        end
    end
    return text
end

function init(arguments)
    local file = assert(io.open("/dev/urandom", "rb")) -- else each run has the same random numbers
    local a, b, c, d = file:read(4):byte(1, 4)
    math.randomseed(((a * 256 + b) * 256 + c) * 256 + d)
    file:close()
    file = assert(io.open(arguments[1], "rb"))
    for length in function() return file:read("*n", 1) end do
        requests[#requests + 1] = prepared(file:read(length))
    end
    file:close()
end

function request()
    turn = turn % #requests + 1
    local text = requests[turn]
    return type(text) == "string" and text or text.before .. text.key() .. text.after
end

function done(summary, latency)
    local errors = summary.errors
    io.write(string.format(
        '{"answers": %d, "seconds": %f, "refused": %d, "broken": %d, "p50": %f, "p99": %f}\n',
        summary.requests, summary.duration / 1e6, errors.status,
        errors.connect + errors.read + errors.write + errors.timeout,
        latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
