-- Places: how many requests are under way, of all clients and of each.
local ffi = require "ffi"
local settings = require "settings"

ffi.cdef [[
    int kill(int process, int signal);
    int prctl(int option, unsigned long, unsigned long, unsigned long, unsigned long);
]]

local counts, workers = ngx.shared.places, ngx.shared.workers
local own = "" -- this worker's process id, a part of its keys
local living, looked = {}, 0 -- nginx's workers, and when that was
local placed = {} -- the client whose place a request has, by its connection

local places = {}

-- Places are counted by worker, so that those of a killed worker go with it.
function places.start_worker()
    if ffi.os == "Linux" then
        ffi.C.prctl(1, 9, 0, 0, 0) -- PR_SET_PDEATHSIG, SIGKILL: no worker outlives its master
    end
    own = tostring(ngx.worker.pid())
    for _, key in ipairs(counts:get_keys(0)) do
        if key:find(own .. " ", 1, true) == 1 then -- of an earlier process with this number
            counts:delete(key)
        end
    end
    workers:set(own, true)
end

local function taken(name)
    if ngx.now() - looked >= 1 then
        living, looked = {}, ngx.now()
        for _, worker in ipairs(workers:get_keys(0)) do
            if ffi.C.kill(tonumber(worker), 0) == 0 then
                living[#living + 1] = worker
            else
                workers:delete(worker)
            end
        end
    end
    local sum = 0
    for _, worker in ipairs(living) do
        sum = sum + (counts:get(worker .. " " .. name) or 0)
    end
    return sum
end

local function change(name, by)
    local key = own .. " " .. name
    if counts:incr(key, by, 0) == 0 then
        counts:delete(key)
    end
end

-- Take a place for the request until it ends; false if there is none.
function places.take()
    local client = ngx.var.client_id
    local all = taken "all"
    if ngx.var.client == settings.jobs_client and all - taken(client) >= settings.jobs_yield_at then
        return false -- an image of a job: others are before it
    end
    if all >= settings.max_concurrent or taken(client) >= settings.max_concurrent_per_client then
        return false
    end
    change("all", 1)
    change(client, 1)
    placed[ngx.var.connection] = client
    return true
end

-- The request has ended.
function places.leave(connection)
    if placed[connection] then
        change("all", -1)
        change(placed[connection], -1)
        placed[connection] = nil
    end
end

return places
